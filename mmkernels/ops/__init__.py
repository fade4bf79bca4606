"""The hot paths: one folder each, with its public function, its registration, its reference and its backends."""
