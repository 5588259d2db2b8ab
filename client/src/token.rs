//! Fencing tokens, and the check that a resource makes.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::sync::Mutex;

use crate::lock::lock;

/// A fencing token. Each later grant of the same key has a greater one, for ever. Send it with
/// every write to the resource that the lease protects.
///
/// ```
/// use leased_client::FencingToken;
///
/// let token = FencingToken::new(1_763_892_900_123);
/// assert_eq!(token.get(), 1_763_892_900_123);
/// assert_eq!(token.to_string(), "1763892900123");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken(i64);

impl FencingToken {
    /// The token with this number, as a resource receives it with a write.
    #[must_use]
    pub const fn new(number: i64) -> Self {
        Self(number)
    }

    /// The token's number, to send along and to store.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl Display for FencingToken {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Refuses stale tokens: keeps the greatest token that a resource has seen of each key.
///
/// The tokens are kept in memory, with one entry for each key that was ever checked. A resource
/// that outlives its process must store the token beside its data, and compare the two in the same
/// write (`docs/fencing.md`).
///
/// Source: M. Kleppmann, "How to do distributed locking" (2016); Chubby calls it a sequencer
/// (Burrows, OSDI 2006, section 2.4).
///
/// ```
/// use leased_client::{FencingGuard, FencingToken};
///
/// let guard = FencingGuard::new();
/// assert!(guard.check("accounts/7", FencingToken::new(41)).is_ok());
/// assert!(guard.check("accounts/7", FencingToken::new(42)).is_ok(), "the next holder");
/// assert!(guard.check("accounts/7", FencingToken::new(42)).is_ok(), "and again");
/// let stale = guard.check("accounts/7", FencingToken::new(41)).unwrap_err();
/// assert_eq!(stale.to_string(), "token 41 is stale: 42 has been seen");
/// ```
#[derive(Debug, Default)]
pub struct FencingGuard {
    seen: Mutex<HashMap<String, FencingToken>>,
}

impl FencingGuard {
    /// A guard that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks the token of a write. If another write of the same key is checked before this one is
    /// applied, check again.
    ///
    /// # Errors
    /// [`StaleToken`] if a later holder's token has been seen: refuse the write.
    pub fn check(&self, key: &str, token: FencingToken) -> Result<(), StaleToken> {
        let mut seen = lock(&self.seen);
        match seen.get_mut(key) {
            Some(greatest) if *greatest > token => Err(StaleToken { token, seen: *greatest }),
            Some(greatest) => {
                *greatest = token;
                Ok(())
            }
            None => {
                seen.insert(key.to_owned(), token);
                Ok(())
            }
        }
    }
}

/// The error for a write whose token is older than one that has been seen of the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token {token} is stale: {seen} has been seen")]
pub struct StaleToken {
    /// The token of the write.
    pub token: FencingToken,
    /// The greatest token seen.
    pub seen: FencingToken,
}
