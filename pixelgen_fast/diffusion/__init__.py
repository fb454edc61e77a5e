"""The flow and its objectives as pure functions: no model, no configuration object, no hidden state.

path.py noises an image and converts between predictions, energy.py is a path whose end moves, time.py draws times,
label drops and noise from (seed, image number), loss.py is the flow-matching loss, solver.py turns a network into
images. Everywhere t=0 is noise, t=1 is data.
"""
