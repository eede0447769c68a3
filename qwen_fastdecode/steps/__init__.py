"""What a layer's decode step is: on all heads, or on a tensor-parallel rank's."""
