"""One kernel per file: formula, reference, Triton, autograd, public function. Imports torch, triton, core's errors."""
