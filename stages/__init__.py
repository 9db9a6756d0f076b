"""What a run does, stage by stage; see stages/load.py to stages/export.py for the verbs, the folders for the nouns."""
