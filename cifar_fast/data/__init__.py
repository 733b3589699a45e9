"""Images and labels: where they come from, and how a batch is drawn and augmented."""
