"""What an attacker does to images and captions."""
