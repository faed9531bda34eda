"""What a process of ours changes in the libraries that reach the platform, before it uses them."""
