"""What ``patches/`` is made of: extension points, small fixes, and the messages of their commits."""
