"""`python -m kernels gpu-day`: everything to find out on a GPU that is lent for minutes, in order of worth.

Stages are data (`stages`); each is a child process (`stage_process`) that leaves its results in a work folder, which
`day_folder` packs. It uses the other tools by their command lines, and the suite, where a checkout has it, by its own.
"""
