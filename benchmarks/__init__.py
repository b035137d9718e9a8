"""Speed of lesionsynth beside the same work done with other libraries: correctness first, then time."""
