"""Scripts that exports copy as they are. They need torch, transformers and safetensors, and nothing of lensteer."""
