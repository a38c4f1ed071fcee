"""Shows runs to people: panes and a timeline on a terminal, plain lines elsewhere. Folds of events, nothing more."""
