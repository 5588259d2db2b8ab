//! One call: sent to one daemon after another until one answers or the time is up.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::Endpoints;
use crate::boot_instant::{BootInstant, after};
use crate::daemon::{Daemon, Purpose};
use crate::error::{Error, Failure, cause};

/// The pause after the first round of failures, before jitter. The pause doubles with each round.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause, before jitter.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The header that says how often a call has been sent before. gRPC uses it for its own retries.
pub(crate) const PREVIOUS_ATTEMPTS: &str = "grpc-previous-rpc-attempts";

/// A daemon's answer, and the time from which its durations count.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) body: T,
    /// When the request was about to leave.
    pub(crate) sent_at: BootInstant,
}

/// A failed attempt that may be retried.
#[derive(Debug, Default)]
pub(super) struct Failed {
    /// What went wrong, unless there was no answer in time.
    cause: Option<String>,
    /// The daemon's answer, if there was one.
    source: Option<Status>,
    /// The pause that the daemon asked for.
    asked: Option<Duration>,
}

impl Failed {
    /// Describes an attempt that ended with `status`.
    pub(super) fn at(failure: Failure, status: Status) -> Self {
        let (cause, asked) = match failure {
            Failure::Useless(error) | Failure::Final(error) => (error.to_string(), None),
            Failure::Passing(asked) => (cause(&status), asked),
        };
        Self { cause: Some(cause), source: Some(status), asked }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { cause: Some(error.to_string()), ..Self::default() }
    }
}

impl Endpoints {
    /// Sends `request` until a daemon answers, or for as long as [`timeout`](Self::timeout).
    ///
    /// # Errors
    /// The daemon's answer, if it is an error, or [`Error::Unavailable`].
    pub(crate) async fn call<R: Clone, T, F>(
        &self,
        purpose: Purpose,
        request: R,
        send: impl FnMut(Channel, Request<R>) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_waiting(purpose, Instant::now(), request, send).await
    }

    /// Sends a call that may wait in a queue until `until`. The timeout counts from then.
    ///
    /// # Errors
    /// The daemon's answer, if it is an error, or [`Error::Unavailable`].
    pub(crate) async fn call_waiting<R: Clone, T, F>(
        &self,
        purpose: Purpose,
        until: Instant,
        request: R,
        mut send: impl FnMut(Channel, Request<R>) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let give_up = after(until, self.timeout);
        let mut pauses = Pauses::default();
        let mut attempts = 0;
        // The latest known cause of a failure. A later attempt without an answer does not replace
        // it.
        let mut last_cause: Option<(String, Option<Status>)> = None;
        loop {
            // Of three or more daemons, a silent one takes a third of the time, which leaves time
            // for two others.
            let patience = self.timeout / u32::try_from(self.len().min(3)).unwrap_or(1);
            let answer_by = after(Instant::now().max(until), patience).min(give_up);
            // Not extended to `until`, because the wait in the queue begins once the call is sent.
            let prepare_by = after(Instant::now(), patience).min(give_up);
            let once = async {
                let daemon = self.prepared(purpose, prepare_by).await?;
                let slot = daemon.slot(purpose);
                let sent_at = BootInstant::now();
                let sent = send(slot.channel.clone(), attempt(request.clone(), attempts));
                attempts += 1;
                let Ok(answered) = timeout_at(answer_by, sent).await else {
                    self.switch(&slot, &Failure::Passing(None));
                    return Err(Failed::default());
                };
                match answered {
                    Ok(response) => {
                        self.note_store_or_switch(&slot, response.metadata())?;
                        Ok(Ok(Answer { body: response.into_inner(), sent_at }))
                    }
                    Err(status) => match self.fail(&slot, &status) {
                        Failure::Final(error) => Ok(Err(error)),
                        failure => Err(Failed::at(failure, status)),
                    },
                }
            };
            let failed = match once.await {
                Ok(answer) => return answer,
                Err(failed) => failed,
            };
            tracing::debug!(cause = failed.cause, "a call failed");
            if let Some(cause) = failed.cause {
                last_cause = Some((cause, failed.source));
            }
            if let Some(error) = self.useless() {
                return Err(error);
            }
            let pause = pauses.next(self.len(), failed.asked);
            if after(Instant::now(), pause) >= give_up {
                let (cause, source) = last_cause.unwrap_or_else(|| (self.silence(), None));
                let cause = self.with_barred(cause);
                return Err(Error::Unavailable { endpoints: self.names.join(", "), cause, source });
            }
            sleep(pause).await;
        }
    }

    /// Returns the daemon to use, once it is known to serve the same store as the others. Fails if
    /// that takes until `by`.
    ///
    /// # Errors
    /// The reason why the daemon cannot be used.
    async fn prepared(&self, purpose: Purpose, by: Instant) -> Result<Arc<Daemon>, Failed> {
        let daemon = match timeout_at(by, self.pick()).await {
            Ok(Ok(daemon)) => daemon,
            Ok(Err(cause)) => return Err(Failed { cause: Some(cause), ..Failed::default() }),
            Err(_) => return Err(Failed::default()),
        };
        // No probe before keepalives: a wrong store does not have their leases, and their answers
        // name the store anyway.
        if purpose != Purpose::KeepAlive && self.len() > 1 && !daemon.has_answered() {
            self.probe(&daemon, by).await?;
        }
        Ok(daemon)
    }
}

/// Builds a request that says how often it has been sent before.
fn attempt<R>(body: R, before: u32) -> Request<R> {
    let mut request = Request::new(body);
    if before > 0 {
        request.metadata_mut().insert(PREVIOUS_ATTEMPTS, before.into());
    }
    request
}

/// How long to pause between attempts: not at all within a round over all daemons, and longer after
/// each round.
#[derive(Debug)]
pub(crate) struct Pauses {
    tries: usize,
    pause: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { tries: 0, pause: FIRST_PAUSE }
    }
}

impl Pauses {
    /// Whether no attempt has failed yet.
    pub(crate) fn is_first(&self) -> bool {
        self.tries == 0
    }

    /// Returns the pause after one more failure, given the number of daemons. After a round, the
    /// pause is at least what a daemon has `asked` for, of which no more than [`LONGEST_PAUSE`]
    /// counts.
    pub(crate) fn next(&mut self, daemons: usize, asked: Option<Duration>) -> Duration {
        self.tries += 1;
        if !self.tries.is_multiple_of(daemons) {
            return Duration::ZERO;
        }
        let pause = self.pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        pause.max(asked.unwrap_or_default().min(LONGEST_PAUSE))
    }
}
