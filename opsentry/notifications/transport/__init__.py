"""Connect to the outside, over HTTP and SMTP, through the egress filter."""
