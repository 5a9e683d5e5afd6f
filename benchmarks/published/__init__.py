"""The attacks that papers compare with, as published: slow and plain, written from descriptions alone."""
