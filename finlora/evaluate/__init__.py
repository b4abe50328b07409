"""Evaluation: asking, scoring, statistics, reports."""
