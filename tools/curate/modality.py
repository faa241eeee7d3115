"""Tell CT, T1, T1ce, T2 and FLAIR apart by what a record holds, with a confidence from 0 to 1.

Two witnesses are heard for MR: the sequence's parameters and the words of its description (or its file's name). Where
both say the same the confidence is high; where one is silent it is lower; where they differ it is below what is used.
"""

from typing import Any

AGREE, WORDS_ALONE, PARAMETERS_ALONE, NAME, FOLDER, GIVEN = 0.95, 0.8, 0.7, 0.8, 0.7, 1.0
DISAGREE = 0.4
# Kinds of MR that are none of the five, by the words that tell them.
OTHERS = ("star", "stir", "pd", "diffusion", "functional", "perfusion", "angiography", "map", "localizer", "derived")


def decide(record: dict[str, Any], given: str = "") -> tuple[str, float, str]:
    """Return the modality ("" if it is none of the five), the confidence, and what told it.

    Args:
        record: of `read_record`.
        given: what the user says all volumes of this source without tags are; tags win over it.
    """
    if record["kind"] == "dicom":
        if record["modality"] == "CT":
            return ("", 1.0, "CT perfusion") if "perfusion" in record["words"] else ("ct", 1.0, "DICOM")
        return _mr(record)
    if given:
        return given, GIVEN, "given"
    for words, confidence, told in ((record["words"], NAME, "name"), (record["folder_words"], FOLDER, "folder")):
        name, other = _by_words(words)
        if other:
            return "", confidence, f"{told}: {other}"
        if name:
            return name, confidence, told
    return "", 0.0, "nothing tells it"


def _by_words(words: list[str]) -> tuple[str, str]:
    """Return (modality, kind that is none of the five), either of them "" if words do not tell it."""
    found = set(words)
    if other := found & set(OTHERS):
        return "", sorted(other)[0]
    named = found & {"ct", "t1", "t1ce", "t2", "flair"}
    if "t1ce" in named or "t1" in named and "contrast" in found and "without" not in found:
        named = named - {"t1", "t1ce"} | {"t1ce"}
    if "flair" in named:
        named -= {"t2"}  # "T2 FLAIR" is the usual name
    return (named.pop(), "") if len(named) == 1 else ("", "")


def _mr(record: dict[str, Any]) -> tuple[str, float, str]:
    tags = record["modality_tags"]
    said, other = _by_words(record["words"])
    if other:
        return "", AGREE, f"description: {other}"
    measured, why = by_parameters(tags)
    # A description names a contrast agent that the header forgot, or the other way round: the agent is no quarrel.
    if {said, measured} == {"t1", "t1ce"}:
        if said == "t1ce":
            return "t1ce", WORDS_ALONE, "description; the parameters say T1"
        if "without" in record["words"]:
            return "t1", WORDS_ALONE, "description"
        return "t1ce", WORDS_ALONE, "contrast agent; the parameters and the description say T1"
    if said and measured:
        if said == measured:
            return said, AGREE, "description and parameters"
        return said, DISAGREE, f"the description says {said}, the parameters {measured}"
    if said:
        if why:  # the parameters speak for a kind that is none of the five
            return said, DISAGREE, f"the description says {said}, the parameters {why}"
        return said, WORDS_ALONE, "description"
    if measured:
        return measured, PARAMETERS_ALONE, "parameters"
    return "", 0.0, why or "nothing tells it"


def by_parameters(tags: dict[str, Any]) -> tuple[str, str]:
    """Return what TR, TE, TI (ms) and sequence tell: (modality, "") or ("", the kind that is none of the five).

    The limits are the usual ones of radiology's textbooks for 1.5 and 3 T: T1 has a short TR and TE; T2 has both long;
    a long TR with a short TE is proton density; FLAIR nulls fluid, whose T1 of 3 to 4 s takes a TI of 1.6 to 3 s.
    """
    tr, te, ti, flip = tags["tr_ms"], tags["te_ms"], tags["ti_ms"] or 0, tags["flip_deg"]
    sequence = set(tags["sequence"])
    t1 = "t1ce" if tags["agent"] else "t1"
    if tr is None or te is None:
        return "", ""
    if "EP" in sequence:
        return "", "echo-planar"
    if ti >= 1500 and te >= 60 and tr >= 4000:
        return "flair", ""
    if 80 <= ti < 300 and tr >= 1500 and "GR" not in sequence:
        return "", "STIR"
    if "GR" in sequence and "SE" not in sequence:
        if ti >= 300 and te <= 10:  # inversion-prepared gradient echo (MPRAGE)
            return t1, ""
        if te >= 12:
            return "", "T2*"
        if te <= 10 and tr <= 800 and (flip is None or flip >= 8):
            return t1, ""
        return "", ""
    if ti >= 300 and te <= 30 and tr >= 1000:  # T1 FLAIR
        return t1, ""
    if tr <= 1200 and te <= 30:
        return t1, ""
    if tr >= 1800 and te >= 60:
        return "t2", ""
    if tr >= 1500 and te < 40:
        return "", "proton density"
    return "", ""
