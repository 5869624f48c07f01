"""Objectives as functions of the terms of a pair."""
