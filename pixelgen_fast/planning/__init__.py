"""What a run needs and how long it takes, before it starts: from its own training step, traced on the meta device.

trace        the operations of a step: bytes, FLOPs, launches    parts          the module that each is of
gpu_kernels  what is one kernel on a GPU                         lifetimes      how long tensors live
rates        from bytes and FLOPs to seconds                     cards          the GPUs, of cards.json or a file
step         forward, backward and optimizer, traced             communication  what ranks send each other
estimate     seconds, memory, hours, energy, three times         changes        what would help most
content      the tables                                          text, page, charts    where they are shown
command      pixelgen plan
"""
