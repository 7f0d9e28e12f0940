"""Two tuning logs or more side by side: what became faster, by how much, and how sure that is.

sources      logs by path: what was measured of each kernel, and in which surroundings
statistics   intervals and p values from raw samples
comparison   rows with verdicts, their mean, gates
convergence  how each search came to its best
words        names, numbers and notes as people read them
text, page   on a terminal and as Markdown; as one HTML page
drawing      where ratios and searches lie in a drawing
plot         as a drawing in a file
"""
