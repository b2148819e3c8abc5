"""Pages for people: subscribing by e-mail, and what the links in e-mails lead to."""
