//! The key that is leased. A `Key` is checked when it is made, so no other code checks it again.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// The longest key, in bytes of UTF-8.
pub const MAX_KEY_BYTES: usize = 512;

/// A key: 1 to [`MAX_KEY_BYTES`] bytes of UTF-8 without control characters. Cheap to clone.
///
/// Callers may structure keys with `/`. The daemon gives `/` no meaning.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

/// Why a string cannot be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// The string is empty.
    #[error("must not be empty")]
    Empty,
    /// The string is longer than [`MAX_KEY_BYTES`].
    #[error("is {0} bytes long; at most 512 are allowed")]
    TooLong(usize),
    /// The string has a control character, which could falsify listings and logs.
    #[error("must not contain control characters")]
    ControlCharacter,
}

impl Key {
    /// Returns the key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `Borrow` is sound because keys are ordered, compared and hashed like their text.
impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for Key {
    type Error = InvalidKey;

    fn try_from(text: &str) -> Result<Self, InvalidKey> {
        if text.is_empty() {
            Err(InvalidKey::Empty)
        } else if text.len() > MAX_KEY_BYTES {
            Err(InvalidKey::TooLong(text.len()))
        } else if text.chars().any(char::is_control) {
            Err(InvalidKey::ControlCharacter)
        } else {
            Ok(Self(text.into()))
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_1_to_512_bytes() {
        assert_eq!(Key::try_from(""), Err(InvalidKey::Empty));
        assert!(Key::try_from("x").is_ok());
        assert!(Key::try_from("é".repeat(256).as_str()).is_ok());
        assert_eq!(Key::try_from("x".repeat(513).as_str()), Err(InvalidKey::TooLong(513)));
    }

    #[test]
    fn a_key_has_no_control_characters() {
        for bad in ["a\0b", "a\nb", "\u{7f}", "\u{85}"] {
            assert_eq!(Key::try_from(bad), Err(InvalidKey::ControlCharacter), "{bad:?}");
        }
        for good in ["$holders", "$$NOW", "a.b", "__proto__", "\"'", "ключ", "鍵", "🔑", " "] {
            assert_eq!(Key::try_from(good).expect("a key").as_str(), good);
        }
    }
}
