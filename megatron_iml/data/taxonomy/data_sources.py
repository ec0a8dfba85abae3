"""One name for each original data set: benchmarks spell the same one in many ways.

    data_source("super_glue__boolq"), data_source("bool_q"), data_source("BoolQ")  ->  "boolq"
    data_source("race__high"), data_source("race__middle")                         ->  "race"
    data_source("cot_ecqa"), data_source("cos_e__v1.11")                           ->  "commonsenseqa"

Splits use it to keep what is evaluated and what is trained on apart across benchmarks. It knows names, not
contents: what shares text under unrelated names is for the contamination check to find.
"""

import re

# Data sets that are collections: the part after the name is what the questions come from.
# "glue__rte" is RTE, but "race__high" is RACE: only a list can tell the two apart.
COLLECTIONS = (
    "dialoglue",
    "flan",
    "glue",
    "kilt",
    "kilt_tasks",
    "super_glue",
    "superglue",
    "tweet_eval",
)
# Other names of one data set, and data sets made from the rows of another, in the spelling of `_squeezed`.
ALIASES = {
    "agnewssubset": "agnews",
    "aquarat": "aqua",
    "arc": "ai2arc",
    "arcchallenge": "ai2arc",
    "arceasy": "ai2arc",
    "art": "abductivenli",
    "ay2": "aidayago2",
    "cose": "commonsenseqa",
    "duorcparaphraserc": "duorc",
    "duorcselfrc": "duorc",
    "e2e": "e2enlg",
    "e2enlgcleaned": "e2enlg",
    "ecqa": "commonsenseqa",
    "enhancedwsc": "wsc",
    "eqasc": "qasc",
    # Its sentences are SNLI's, with explanations: to train on one is to train on the other.
    "esnli": "snli",
    "geofunql": "geoquery",
    "gluemrpc": "mrpc",
    "glueqqp": "quora",
    "imdbreviews": "imdb",
    "kiltay2": "aidayago2",
    "kiltfever": "fever",
    "kilthotpotqa": "hotpotqa",
    "kiltnq": "naturalquestions",
    "math": "mathcompetition",
    "mathmaticsdataset": "mathdataset",
    "mnlimatched": "mnli",
    "mnlimismatched": "mnli",
    "multinli": "mnli",
    "mwsc": "wsc",
    "nq": "naturalquestions",
    "nqopen": "naturalquestions",
    "pawswiki": "paws",
    "qqp": "quora",
    "scitailv11": "scitail",
    "sensemaking": "semeval2020task4",
    "squadv1": "squad",
    "squadv11": "squad",
    "squadv2": "squad",
    "storyclozerocstories": "storycloze",
    "sst": "sst2",
    "triviaqawikimissing": "triviaqa",
    "winogradwsc": "wsc",
    # Reasons for the sentences of WSC273.
    "winowhy": "wsc",
    "wsc273": "wsc",
    "wscfixed": "wsc",
    "wtq": "wikitablequestions",
    "wikitq": "wikitablequestions",
    "yelppolarityreviews": "yelppolarity",
}


def data_source(name: str) -> str:
    """The data set behind a name: a task's, `<data set>` or `<data set>__<subset>`."""
    # Only "__" parts them: hyphens stand within names, as in e-SNLI.
    data_set, separator, subset = name.strip().removeprefix("cot_").partition("__")
    if separator and data_set in COLLECTIONS:
        data_set = subset
    # Looked up once and not again: the table's values are final names.
    squeezed = _squeezed(data_set)
    return ALIASES.get(squeezed, squeezed)


def _squeezed(name: str) -> str:
    # Without any separator: bool_q, BoolQ and bool-q are one name.
    return re.sub(r"[\W_]+", "", name.lower())
