//! The lease id, which names an acquisition, and the fencing token, which orders the grants of a
//! key.

use std::fmt;

use uuid::Uuid;

/// Names one acquisition. A bearer secret, which the daemon reveals only to the acquirer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(Uuid);

impl LeaseId {
    /// Returns a new id with 122 random bits.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// Returns the id's 16 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }

    /// Returns the id as its acquirer sees it: a UUID in lower case with hyphens.
    #[must_use]
    pub fn reveal(self) -> String {
        self.0.hyphenated().to_string()
    }
}

impl From<[u8; 16]> for LeaseId {
    fn from(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }
}

/// Why a text cannot be a lease id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLeaseId {
    /// The text is not a UUID, or not in the one spelling that the daemon uses.
    #[error("must be a UUID in lower case with hyphens, such as 0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02")]
    Spelling,
    /// The nil UUID. Two callers that both forget to choose an id would share one lease.
    #[error("must not be the nil UUID; choose a random UUID for each acquisition")]
    Nil,
}

impl TryFrom<&str> for LeaseId {
    type Error = InvalidLeaseId;

    /// Accepts only the spelling of [`reveal`](Self::reveal), so that an id has the same text
    /// everywhere.
    fn try_from(text: &str) -> Result<Self, InvalidLeaseId> {
        const HYPHENATED: usize = uuid::fmt::Hyphenated::LENGTH;
        // `try_parse` would also accept upper case, braces, a URN and a spelling without hyphens.
        if text.len() != HYPHENATED || text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(InvalidLeaseId::Spelling);
        }
        match Uuid::try_parse(text) {
            Ok(id) if id.is_nil() => Err(InvalidLeaseId::Nil),
            Ok(id) => Ok(Self(id)),
            Err(_) => Err(InvalidLeaseId::Spelling),
        }
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever has the id can touch and release the lease, so logs must not show it. For the
        // same reason there is no `Display`.
        f.write_str("LeaseId(..)")
    }
}

/// Orders the grants of a key: each later grant has a greater token. Zero means never granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FencingToken(pub i64);

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debug_print_keeps_the_secret() {
        let id = LeaseId::random();
        assert_eq!(format!("{id:?}"), "LeaseId(..)");
        assert_eq!(LeaseId::try_from(id.reveal().as_str()).expect("its own spelling"), id);
    }

    #[test]
    fn an_id_has_one_spelling_and_is_not_nil() {
        let id = Uuid::new_v4();
        let misspelt = [
            id.hyphenated().to_string().to_uppercase(),
            id.simple().to_string(),
            id.braced().to_string(),
            id.urn().to_string(),
            format!(" {}", id.hyphenated()),
            format!("{}00-00", &id.hyphenated().to_string()[..31]),
            String::new(),
            "é".repeat(18),
        ];
        for text in misspelt {
            assert_eq!(LeaseId::try_from(text.as_str()), Err(InvalidLeaseId::Spelling), "{text:?}");
        }
        let nil = Uuid::nil().hyphenated().to_string();
        assert_eq!(LeaseId::try_from(nil.as_str()), Err(InvalidLeaseId::Nil));
        let max = Uuid::max().hyphenated().to_string();
        assert_eq!(LeaseId::try_from(max.as_str()).map(LeaseId::reveal), Ok(max));
    }
}
