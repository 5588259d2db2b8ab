//! Programs that call a daemon with the generated stubs, and compute the deadlines of their leases
//! themselves.

use std::time::Duration;

use leased_client::FencingToken;
use leased_client::v1::TouchRequest;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tonic::Code;
use uuid::Uuid;

use super::history::{History, Mode};
use super::holder::between;
use super::world::{DAEMONS, KEYS, channel};
use crate::support::{AcquireBuilder, Calls, Leases, acquire, ms, named};

/// The moment from which a program counts the time of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counting {
    /// When the answer arrives, also after a wait. The API's contract forbids this.
    FromAnswer,
    /// When the request is sent. After a wait, the program touches the lease first.
    FromRequest,
}

/// A program on its own host.
pub(crate) struct Naive {
    pub(crate) name: String,
    pub(crate) history: History,
    pub(crate) counting: Counting,
}

impl Naive {
    pub(crate) async fn live(self) {
        let mut stubs = DAEMONS.map(|daemon| LeaseServiceClient::new(channel(daemon)));
        loop {
            stubs.reverse();
            self.round(&mut stubs[0]).await;
            sleep(between(0, 300)).await;
        }
    }

    async fn round(&self, stub: &mut Leases) {
        let (key, id, ttl) = (KEYS[fastrand::usize(..KEYS.len())], Uuid::new_v4(), between(1000, 3000));
        let request = acquire(key).id(id).ttl(ttl).wait(between(100, 3000));
        let sent_at = Instant::now();
        let Ok(Ok(answer)) = timeout(Duration::from_secs(5), stub.get_lease(request)).await else { return };
        let mut deadline = self.deadline(sent_at, ttl);
        if answer.waited && self.counting == Counting::FromRequest {
            deadline = sent_at;
            self.touch(stub, key, id, &mut deadline, Instant::now() + ttl).await;
        }
        let until = Instant::now() + between(50, 4000);
        if Instant::now() < deadline {
            let token = FencingToken::new(answer.fencing_token);
            let belief = self.history.believe(&self.name, key, token, Mode::Exclusive);
            while Instant::now() < until.min(deadline) {
                sleep_until(until.min(deadline).min(Instant::now() + ttl / 3)).await;
                let give_up = until.min(deadline);
                self.touch(stub, key, id, &mut deadline, give_up).await;
            }
            drop(belief);
        }
        drop(timeout(Duration::from_secs(1), stub.give_back(&named(key, id))).await);
    }

    async fn touch(&self, stub: &mut Leases, key: &str, id: Uuid, deadline: &mut Instant, give_up: Instant) {
        let lease = named(key, id);
        let sent_at = Instant::now();
        match timeout_at(give_up, stub.touch(TouchRequest { lease: Some(lease) })).await {
            Ok(Ok(answer)) => {
                let remaining = answer.into_inner().remaining.unwrap().try_into().unwrap();
                *deadline = self.deadline(sent_at, remaining);
            }
            Ok(Err(status)) if status.code() == Code::NotFound => *deadline = sent_at,
            Ok(Err(_)) => sleep_until(give_up.min(Instant::now() + ms(50))).await,
            Err(_) => {}
        }
    }

    fn deadline(&self, sent_at: Instant, remaining: Duration) -> Instant {
        match self.counting {
            Counting::FromAnswer => Instant::now() + remaining,
            // The margin covers the difference between two hosts' clocks: less than a tick.
            Counting::FromRequest => sent_at + remaining - ms(10),
        }
    }
}
