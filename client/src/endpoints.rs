//! The daemons that a client may ask: which one is asked, and when to ask another. Knows nothing of leases.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::error::{Error, Failure, cause};
use crate::moment::Moment;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A daemon, and how it is reached.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) name: String,
    pub(crate) channel: Channel,
    position: usize,
}

/// An answer, and what it is counted from.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) body: T,
    /// Just before the request left.
    pub(crate) sent_at: Moment,
}

/// All daemons that a client may ask, of which one is preferred until it fails.
#[derive(Debug)]
pub(crate) struct Endpoints {
    all: Vec<Endpoint>,
    preferred: AtomicUsize,
    /// How long a call may take beyond what it waits at the daemon.
    timeout: Duration,
}

impl Endpoints {
    /// `channels` must not be empty.
    pub(crate) fn new(channels: Vec<(String, Channel)>, timeout: Duration) -> Self {
        let endpoint = |(position, (name, channel))| Endpoint { name, channel, position };
        let all: Vec<Endpoint> = channels.into_iter().enumerate().map(endpoint).collect();
        // Clients that start together should not all ask the same daemon.
        let preferred = AtomicUsize::new(fastrand::usize(..all.len()));
        Self { all, preferred, timeout }
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The daemon to ask.
    pub(crate) fn preferred(&self) -> Endpoint {
        self.all[self.preferred.load(Ordering::Relaxed) % self.all.len()].clone()
    }

    /// Asks another from now on, unless somebody has already turned away from this one.
    pub(crate) fn avoid(&self, endpoint: &Endpoint) {
        let next = (endpoint.position + 1) % self.all.len();
        let (order, position) = (Ordering::Relaxed, endpoint.position);
        let _ = self.preferred.compare_exchange(position, next, order, order);
    }

    /// Sends `request` until someone answers or [`timeout`](Self::timeout) is over.
    ///
    /// # Errors
    /// The answer, if it is an error, or [`Error::Unavailable`].
    pub(crate) async fn call<R: Clone, T, F>(
        &self,
        request: R,
        send: impl FnMut(Channel, R) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_waiting(Instant::now(), request, send).await
    }

    /// The same with a call that the daemon may answer as late as `until`.
    ///
    /// # Errors
    /// As above.
    pub(crate) async fn call_waiting<R: Clone, T, F>(
        &self,
        until: Instant,
        request: R,
        mut send: impl FnMut(Channel, R) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let give_up = until + self.timeout;
        // A daemon that is silent leaves time for another one.
        let patience = if self.len() > 1 { self.timeout / 2 } else { self.timeout };
        let mut pauses = Pauses::new(self.len());
        loop {
            let endpoint = self.preferred();
            let late = (Instant::now().max(until) + patience).min(give_up);
            let sent_at = Moment::now();
            let (cause, asked) = match timeout_at(late, send(endpoint.channel.clone(), request.clone())).await
            {
                Ok(Ok(response)) => return Ok(Answer { body: response.into_inner(), sent_at }),
                Ok(Err(status)) => {
                    let cause = cause(&status);
                    match Failure::of(status, &endpoint.name) {
                        Failure::Final(error) => return Err(error),
                        Failure::Passing(pause) => (cause, pause),
                    }
                }
                Err(_) => ("it does not answer in time".to_owned(), None),
            };
            tracing::debug!(endpoint = endpoint.name, cause, "a call failed");
            self.avoid(&endpoint);
            let pause = pauses.next(asked);
            if Instant::now() + pause >= give_up {
                return Err(Error::Unavailable { endpoints: self.names(), cause });
            }
            sleep(pause).await;
        }
    }

    /// Whether the daemon that is asked first is one of ours.
    ///
    /// # Errors
    /// [`Error::NotLeased`] or [`Error::Unavailable`].
    pub(crate) async fn check(&self) -> Result<(), Error> {
        use tonic_health::pb::HealthCheckRequest;
        use tonic_health::pb::health_check_response::ServingStatus;
        use tonic_health::pb::health_client::HealthClient;

        let service = leased_proto::v1::lease_service_server::SERVICE_NAME;
        let request = HealthCheckRequest { service: service.to_owned() };
        let call = self.call(request, |channel, request| async move {
            match HealthClient::new(channel).check(request).await {
                Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => Ok(answer),
                Ok(_) => Err(Status::unavailable("the daemon is there and does not serve, or not yet")),
                // It serves other things.
                Err(status) if status.code() == Code::NotFound => Err(Status::unimplemented("")),
                Err(status) => Err(status),
            }
        });
        call.await.map(drop)
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.all.iter().map(|endpoint| endpoint.name.as_str()).collect();
        names.join(", ")
    }
}

/// How long to pause before the next try: not at all until every daemon has been asked, then longer after each round.
#[derive(Debug)]
pub(crate) struct Pauses {
    endpoints: usize,
    tries: usize,
    pause: Duration,
}

impl Pauses {
    pub(crate) fn new(endpoints: usize) -> Self {
        Self { endpoints, tries: 0, pause: FIRST_PAUSE }
    }

    /// Whether nothing has failed yet.
    pub(crate) fn is_first(&self) -> bool {
        self.tries == 0
    }

    /// The pause after another failure, at least as long as the daemon asked for once all have been tried.
    pub(crate) fn next(&mut self, asked: Option<Duration>) -> Duration {
        self.tries += 1;
        if !self.tries.is_multiple_of(self.endpoints) {
            return Duration::ZERO;
        }
        let pause = self.pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        pause.max(asked.unwrap_or_default().min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_daemon_is_asked_before_there_is_a_pause() {
        let mut pauses = Pauses::new(3);
        let pauses: Vec<Duration> = (0..6).map(|_| pauses.next(None)).collect();
        assert!(pauses[0].is_zero() && pauses[1].is_zero() && !pauses[2].is_zero());
        assert!(pauses[3].is_zero() && pauses[4].is_zero() && pauses[5] > FIRST_PAUSE);
    }

    #[test]
    fn pauses_stay_bounded_and_heed_what_the_daemon_asks() {
        let mut pauses = Pauses::new(1);
        assert!(pauses.next(Some(Duration::from_millis(500))) >= Duration::from_millis(500));
        for _ in 0..40 {
            assert!(pauses.next(Some(Duration::from_secs(3600))) <= LONGEST_PAUSE.mul_f64(1.25));
        }
    }
}
