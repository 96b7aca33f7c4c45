"""The frozen layers below the cut are computed once, and every later epoch, evaluation and run reads their output."""
