"""The operations behind sam_fast: each one public function, a native implementation and a PyTorch reference."""
