"""Experiments, one file each: `just run` lists them. Files that start with an underscore hold what several experiments share."""
