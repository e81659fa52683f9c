"""The texts of classes: templates, files of sentences, which a run takes, and how they are written and checked.

The shipped sets are the JSON files here.
"""
