"""Commands that look around: what this machine offers (`doctor`), and one case of a run in depth (`show`)."""
