"""Evaluation measures a prompt pair: how often harmful requests are refused, and how often harmless ones.

Arms answer the requests of benchmarks, judges read the responses, and a report compares the arms:

    arms.py          the prompts that an arm puts in front of a request
    rivals.py        other defences, with those of steering.py, from a folder (rival_folder.py)
    attacks.py       ways of asking harmful requests
    adaptive.py      a search for suffixes against one arm, with the gradients of defence.py
    benchmarks.py    the requests
    comparison.py    arms answer benchmarks, into a results folder
    judges.py        is a response harmless? harm.py has one more judge, and harm_training.py trains it
    answers.py       is it correct?
    fluency.py       does it still read like text?
    likelihood.py    how likely is it?
    results.py       the results folder
    behaviour.py     what a response does: refuse, go along, or neither
    labels.py        labels by hand, to check the judge
    rejudge.py       another judge on the same responses
    statistics.py    intervals and tests
    summary.py       the folder as numbers
    costs.py         what protection costs on safe requests
    report.py        the numbers as Markdown, with tables.py and plots.py
    adaptive_report.py    the folder and the report of an adaptive attack
    changes.py       two folders side by side
    publish.py       a copy without texts
    inspect/         the same arms, benchmarks and judges in Inspect
    harness.py       the contrast in lm-evaluation-harness
"""
