//! A relay before a daemon that loses the answer to a request. Knows nothing of leases.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Passes on what comes, until a request with certain words: its connection brings no answers any more.
pub(crate) struct Relay {
    url: String,
    broken_off: CancellationToken,
    _task: AbortOnDropHandle<()>,
}

impl Relay {
    /// To the daemon at `to`. Only the first request with `words` goes without its answer.
    pub(crate) async fn losing_the_answer_to(words: &'static str, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let broken_off = CancellationToken::new();
        let (ended, seen) = (broken_off.clone(), Arc::new(AtomicBool::new(false)));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let daemon = TcpStream::connect(to).await.unwrap();
                tokio::spawn(pass(client, daemon, words, Arc::clone(&seen), ended.clone()));
            }
        });
        Self { url, broken_off, _task: AbortOnDropHandle::new(task) }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Breaks off the connection whose answer was lost.
    pub(crate) fn break_off(&self) {
        self.broken_off.cancel();
    }
}

async fn pass(
    mut client: TcpStream,
    mut daemon: TcpStream,
    words: &str,
    seen: Arc<AtomicBool>,
    broken_off: CancellationToken,
) {
    let (mut asked, mut answered) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut loses = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                let request = &asked[..length];
                if request.windows(words.len()).any(|part| part == words.as_bytes()) {
                    loses |= !seen.swap(true, Ordering::Relaxed);
                }
                if daemon.write_all(request).await.is_err() {
                    return;
                }
            }
            read = daemon.read(&mut answered) => {
                let Ok(length @ 1..) = read else { return };
                if !loses && client.write_all(&answered[..length]).await.is_err() {
                    return;
                }
            }
            () = broken_off.cancelled(), if loses => return,
        }
    }
}
