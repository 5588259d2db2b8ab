//! Lease ids: secrets that name one acquisition.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// A lease id: names one acquisition. Anyone who knows it can touch and release the lease, so
/// neither `Debug` nor a log shows it.
///
/// ```
/// let id: leased_client::LeaseId = "0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02".parse()?;
/// assert_eq!(format!("{id:?}"), "LeaseId(secret)");
/// assert_eq!(id.reveal(), "0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02");
/// # Ok::<(), leased_client::InvalidLeaseId>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(Uuid);

impl LeaseId {
    /// The id as text, to pass on.
    #[must_use]
    pub fn reveal(&self) -> String {
        self.0.to_string()
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("LeaseId(secret)")
    }
}

impl From<Uuid> for LeaseId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl FromStr for LeaseId {
    type Err = InvalidLeaseId;

    fn from_str(text: &str) -> Result<Self, InvalidLeaseId> {
        Uuid::try_parse(text).map(Self).map_err(|_| InvalidLeaseId)
    }
}

/// The error for a lease id that is not a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a lease id: a lease id is a UUID, as in 0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02")]
pub struct InvalidLeaseId;
