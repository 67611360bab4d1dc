"""Who is who, and who may do what: certificates, roles, tokens, signatures, the audit log.

Nothing here is imported by `import splitnet` but `credentials` and `roles`, which are light; `cryptography` is imported where a certificate is read or made.
"""
