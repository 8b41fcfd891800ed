"""Programs for machines that are not here: what their compilers say of them."""
