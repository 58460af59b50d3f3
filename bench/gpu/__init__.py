"""`make gpu`: everything one GPU machine is asked, in one call of a fixed length, most important first.

plan        the steps, their commands and the seconds by which each has to have ended
run         carries them out: process groups, one log, one file of records, a summary whatever happens
records     one line of JSON for everything found
facts, build, probes, headline, suite, sanitize, profile   the steps
entries, products, training   what the headline times
stand_in_tools   compute-sanitizer and ncu, where a rehearsal has none
"""
