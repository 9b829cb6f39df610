"""From a reference to pixels: guard, fetch, decode. No model, no queue, no torch."""
