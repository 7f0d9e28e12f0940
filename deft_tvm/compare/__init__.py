"""Two tuning logs or more side by side: what became faster, by how much, and how sure that is.

sources      logs by path: what was measured of each kernel, and in which surroundings
statistics   intervals and p values from raw samples
comparison   rows with verdicts, their mean, gates
convergence  how each search came to its best
text, markdown, page, plot   the same for people
"""
