//! Host names: looked up repeatedly, and turned into daemons.
//!
//! The system's resolver blocks, so each look-up gets a new thread. It does not use tokio's
//! blocking pool: when the system can start no thread, the pool panics in the task that asks for
//! one, and ends everything that this task does.

use std::collections::HashSet;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{io, thread};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tonic::transport::{Endpoint, Uri};

use super::Endpoints;
use crate::builder::Builder;
use crate::daemon::{Daemon, Dial};
use crate::lock::lock;

/// The shortest time between two look-ups of a name, when daemons fail.
const BETWEEN_LOOK_UPS: Duration = Duration::from_secs(1);
/// The longest pause between two look-ups of a name, while no daemon fails.
const NAMES_LAST: Duration = Duration::from_secs(300);

/// A name that is looked up repeatedly.
pub(super) struct Resolving {
    /// The endpoint, as the user wrote it.
    pub(super) name: String,
    pub(super) url: Uri,
    pub(super) host: String,
    pub(super) port: u16,
    /// The addresses of the last successful look-up, and the daemon at each.
    pub(super) found: Mutex<Vec<(SocketAddr, Arc<Daemon>)>>,
    /// Whether the first look-up has ended.
    pub(super) is_looked_up: AtomicBool,
}

impl Endpoints {
    /// Looks up `name` after failures and every five minutes, for as long as the future is polled.
    pub(super) async fn resolve(&self, name: &Resolving) {
        let mut failures = self.failures.subscribe();
        loop {
            failures.mark_unchanged();
            self.looked_up(name, look_up(name.host.clone(), name.port).await);
            let _ = timeout(NAMES_LAST, failures.changed()).await;
            sleep(BETWEEN_LOOK_UPS).await;
        }
    }

    /// Applies the result of a look-up.
    pub(super) fn looked_up(&self, name: &Resolving, found: io::Result<Vec<SocketAddr>>) {
        match found {
            Ok(addresses) => {
                self.found(name, addresses);
                self.state().unknown_name.take_if(|(host, _)| *host == name.host);
            }
            // The earlier addresses stay, because they are the best guess.
            Err(error) => {
                tracing::debug!(name = name.host, %error, "a look-up failed");
                self.state().unknown_name = Some((name.host.clone(), error.to_string()));
            }
        }
        name.is_looked_up.store(true, Ordering::Relaxed);
        self.look_ups.send_replace(());
    }

    /// Adds daemons for new addresses, and removes those whose addresses are gone.
    pub(super) fn found(&self, name: &Resolving, mut addresses: Vec<SocketAddr>) {
        let mut at = lock(&name.found);
        let mut seen = HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        let first = addresses.first().copied();
        let one = addresses.len() == 1;
        let before = std::mem::take(&mut *at);
        for address in addresses {
            let existing = before.iter().find(|(other, _)| *other == address);
            let daemon = existing.map_or_else(
                || {
                    // The resolver puts the address family first that is more likely to work.
                    let rank = usize::from(first.is_some_and(|first| first.is_ipv4() != address.is_ipv4()));
                    let label =
                        if one { name.name.clone() } else { format!("{} ({})", name.name, address.ip()) };
                    Arc::new(Daemon::new(label, rank, dial_to(&name.url, address)))
                },
                |(_, daemon)| Arc::clone(daemon),
            );
            at.push((address, daemon));
        }
        let is_in = |these: &[(SocketAddr, Arc<Daemon>)], daemon: &Arc<Daemon>| {
            these.iter().any(|(_, one)| Arc::ptr_eq(one, daemon))
        };
        let mut state = self.state();
        let preferred = state.daemons.get(state.preferred).cloned();
        state.daemons.retain(|daemon| !is_in(&before, daemon) || is_in(&at, daemon));
        state.daemons.extend(
            at.iter().filter(|(_, daemon)| !is_in(&before, daemon)).map(|(_, daemon)| Arc::clone(daemon)),
        );
        state.daemons.sort_by_key(|daemon| daemon.order);
        state.preferred = preferred.and_then(|daemon| state.position(&daemon)).unwrap_or_default();
    }
}

/// Returns a function that connects to `address`. Requests still name the host in `url`.
fn dial_to(url: &Uri, address: SocketAddr) -> Dial {
    let direct = Endpoint::from_shared(format!("http://{address}")).expect("an address makes a URL");
    let endpoint = Builder::tuned(direct).origin(url.clone());
    Arc::new(move || endpoint.connect_lazy())
}

/// Returns the addresses of `host`, in the resolver's order of preference.
///
/// # Errors
/// The resolver's error, or the system's if it can start no thread. Another attempt may succeed.
async fn look_up(host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let (sender, found) = oneshot::channel();
    let look_up = move || {
        let _ = sender.send((host.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    };
    thread::Builder::new().name("leased-names".to_owned()).spawn(look_up)?;
    found.await.map_err(|_| io::Error::other("the look-up of a name panicked"))?
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_have_addresses_or_an_error() {
        let found = look_up("localhost".to_owned(), 5327).await.unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 5327));
        assert!(!found.is_empty());
        look_up("no.such.name.invalid".to_owned(), 5327).await.unwrap_err();
    }
}
