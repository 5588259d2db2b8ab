//! A relay before a daemon, whose connections fall silent, or lose the answer to a request. Knows nothing of leases.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Passes on what comes, in both directions, for as long as it lives.
pub(crate) struct Relay {
    url: String,
    connections: Arc<AtomicUsize>,
    /// Connections with a lower number are silent.
    silent_below: watch::Sender<usize>,
    broken_off: CancellationToken,
    _task: AbortOnDropHandle<()>,
}

impl Relay {
    /// To the daemon at `to`.
    pub(crate) async fn to(to: SocketAddr) -> Self {
        Self::start(None, to).await
    }

    /// To the daemon at `to`. The first request with `words` goes without its answer, and so does what comes after it over the same
    /// connection.
    pub(crate) async fn losing_the_answer_to(words: &'static str, to: SocketAddr) -> Self {
        Self::start(Some(words), to).await
    }

    async fn start(words: Option<&'static str>, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (silent_below, silence) = watch::channel(0);
        let (connections, broken_off) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let (count, ended) = (Arc::clone(&connections), broken_off.clone());
        let seen = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let daemon = TcpStream::connect(to).await.unwrap();
                let (mut silence, seen, ended) = (silence.clone(), Arc::clone(&seen), ended.clone());
                tokio::spawn(async move {
                    let mut ends = (client, daemon);
                    tokio::select! {
                        () = pass(&mut ends, words, &seen, &ended) => return,
                        _ = silence.wait_for(|below| number < *below) => {}
                    }
                    // Open on both sides, and nothing passes.
                    std::future::pending::<()>().await;
                });
            }
        });
        Self { url, connections, silent_below, broken_off, _task: AbortOnDropHandle::new(task) }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// How many connections were made to it.
    pub(crate) fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// All connections there are fall silent without being closed. Those made later are passed on.
    pub(crate) fn hush(&self) {
        self.silent_below.send_replace(self.count());
    }

    /// Breaks off the connection whose answer was lost.
    pub(crate) fn break_off(&self) {
        self.broken_off.cancel();
    }
}

async fn pass(
    (client, daemon): &mut (TcpStream, TcpStream),
    words: Option<&str>,
    seen: &AtomicBool,
    broken_off: &CancellationToken,
) {
    let (mut asked, mut answered) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut loses = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                let request = &asked[..length];
                if words.is_some_and(|words| request.windows(words.len()).any(|part| part == words.as_bytes())) {
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
