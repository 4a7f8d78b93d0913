"""Studies: experiments that show, or fail to show, what distillation and quantization are worth to each other.

`kdq study claim-a` runs one and writes a page. Both arms of a comparison share seeds, data, order of batches and number
of steps; what is reported is the paired difference with its standard error, whichever way it goes.
"""
