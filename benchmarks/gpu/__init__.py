"""What a visit to a GPU is made of; `gpu_day.py` beside this folder is its command.

    visit      the parts one after another: a process for each measurement, time limits, rows that are there already
    plan       which measurements, in which order, with what limits; for a GPU and for a rehearsal
    child      the process of one measurement
    others     one measurement each: `measure(row, device_free, ...)` imports and compiles what it can, waits in
               device_free() until the device is its own, and hands out rows as it has them
    summary    the rows as a page, as ceilings for the report and as a table of tuned configurations
    wheels     what the machine may lack, carried along

visit, plan, summary and wheels need nothing but Python: they start at once and touch no device.
"""
