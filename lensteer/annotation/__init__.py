"""Annotators that label the sentences of a chain, and measures of their agreement."""

from lensteer.annotation.agreement import (
    Agreement,
    LabelAgreement,
    agreement,
    agreement_of,
    macro_f1,
)
from lensteer.annotation.annotators import (
    Annotator,
    LabeledSentence,
    annotate,
    annotate_report,
    check_labels,
    grammar,
    labeled_sentences,
    labeling,
    labels_of,
    unlabeled,
)
from lensteer.annotation.classifier import SentenceClassifier, fit_classifier
from lensteer.annotation.classifier_model import ClassifierConfig
from lensteer.annotation.classifier_report import ClassifierReport, cross_validate, left_out_source
from lensteer.annotation.judge import Judge, JudgePlan, JudgeReport, JudgeScore
from lensteer.annotation.judge_questions import Remark
from lensteer.annotation.markers import MARKERS, marker_dependence, mask_markers, masked, masking
from lensteer.annotation.published import (
    Problem,
    PublishedReport,
    parse_published,
    read_published,
    write_published,
)
from lensteer.annotation.rules import rules
from lensteer.annotation.stability import LabelStability, Stability, stable_spans

__all__ = [
    "MARKERS",
    "Agreement",
    "Annotator",
    "ClassifierConfig",
    "ClassifierReport",
    "Judge",
    "JudgePlan",
    "JudgeReport",
    "JudgeScore",
    "LabelAgreement",
    "LabelStability",
    "LabeledSentence",
    "Problem",
    "PublishedReport",
    "Remark",
    "SentenceClassifier",
    "Stability",
    "agreement",
    "agreement_of",
    "annotate",
    "annotate_report",
    "check_labels",
    "cross_validate",
    "fit_classifier",
    "grammar",
    "labeled_sentences",
    "labeling",
    "labels_of",
    "left_out_source",
    "macro_f1",
    "marker_dependence",
    "mask_markers",
    "masked",
    "masking",
    "parse_published",
    "read_published",
    "rules",
    "stable_spans",
    "unlabeled",
    "write_published",
]
