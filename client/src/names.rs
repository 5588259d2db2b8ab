//! Looking up host names, without ever failing for good. Knows nothing of leases.
//!
//! The system's resolver blocks, so each look-up has a thread. It is not one of tokio's: when the system has no threads to spare,
//! tokio's pool panics in the task that asks, and with it whatever that task does besides.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;

use tokio::sync::oneshot;

/// The addresses of `host`, in the order in which the system would have them tried.
///
/// # Errors
/// The system's; also when there is no thread for it. Another try may help.
pub(crate) async fn look_up(host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
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
