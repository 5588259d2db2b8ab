//! Who acquired, and in which order: the lease id and the fencing token.

use std::fmt;

use uuid::Uuid;

/// Names one acquisition. A bearer secret: it leaves the daemon only to the one who acquired, so its `Debug` form
/// does not show it and it has no `Display`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(Uuid);

impl LeaseId {
    /// A new id with 122 random bits.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The id's 16 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }

    /// The id as its acquirer sees it: hyphenated lower case.
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

impl TryFrom<&str> for LeaseId {
    type Error = uuid::Error;

    /// Takes a UUID in any of its usual spellings.
    fn try_from(text: &str) -> Result<Self, uuid::Error> {
        Uuid::try_parse(text).map(Self)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseId(..)")
    }
}

/// Orders the grants of a key: strictly greater for each later one, for ever. Zero: never granted.
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
}
