"""What every kernel costs on a GPU that is not there: python -m pixelgen_kernels.report.

    listing     the launches of the named models, from the registry           compile    Triton -> cubin -> resources
    sass        instructions of a kernel, counted                             gpu        limits and ceilings of an H100
    roofline    the time that they give                                       rules      what must hold, the baseline
    warmup      compile on the GPU that is there                              command    the command line

No operator imports it.
"""
