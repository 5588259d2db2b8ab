//! Redis as a contender, with the lock that its documentation describes: a key with an expiry,
//! which scripts release and touch after they have compared its value.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, Pipeline, cmd};
use uuid::Uuid;

use crate::connection::{Connection, Turn};

/// The timeout of an answer. It is longer than the crate's default of half a second, so that late
/// answers are measured.
const PATIENCE: Duration = Duration::from_secs(30);
const RELEASE: &str =
    r#"if redis.call("get", KEYS[1]) == ARGV[1] then return redis.call("del", KEYS[1]) else return 0 end"#;
const TOUCH: &str = r#"if redis.call("get", KEYS[1]) == ARGV[1] then return redis.call("pexpire", KEYS[1], ARGV[2]) else return 0 end"#;

#[derive(Debug, Clone)]
pub(crate) struct Redis {
    connection: MultiplexedConnection,
    release: Arc<str>,
    touch: Arc<str>,
}

#[derive(Debug)]
pub(crate) struct Held {
    key: String,
    value: String,
}

impl Connection for Redis {
    type Held = Held;
    type Stream = Touches;

    async fn connect(address: &str) -> Result<Self> {
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let client = Client::open(address)?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut load = async |script| {
            let hash: String = cmd("SCRIPT").arg("LOAD").arg(script).query_async(&mut connection).await?;
            Ok::<Arc<str>, redis::RedisError>(hash.into())
        };
        let (release, touch) = (load(RELEASE).await?, load(TOUCH).await?);
        Ok(Self { connection, release, touch })
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let held = Held { key, value: Uuid::from_u128(fastrand::u128(..)).to_string() };
        let mut set = cmd("SET");
        set.arg(&held.key).arg(&held.value).arg("NX").arg("PX").arg(millis(ttl)?);
        let answer: Option<String> = set.query_async(&mut self.connection).await?;
        ensure!(answer.is_some(), "the lock was not granted");
        Ok(held)
    }

    async fn release(&mut self, held: Held) -> Result<()> {
        let released: u64 = script(&self.release, &held).query_async(&mut self.connection).await?;
        ensure!(released == 1, "the lock was lost");
        Ok(())
    }

    async fn keep(&mut self, held: Vec<Held>, ttl: Duration) -> Result<Touches> {
        let mut touches = Pipeline::with_capacity(held.len());
        for held in held {
            let mut touch = script(&self.touch, &held);
            touch.arg(millis(ttl)?);
            touches.add_command(touch);
        }
        let mut stream = Touches { connection: self.connection.clone(), touches };
        stream.turn().await?;
        Ok(stream)
    }
}

fn script(hash: &str, held: &Held) -> Cmd {
    let mut script = cmd("EVALSHA");
    script.arg(hash).arg(1).arg(&held.key).arg(&held.value);
    script
}

fn millis(ttl: Duration) -> Result<u64> {
    Ok(u64::try_from(ttl.as_millis())?)
}

/// The touches of several leases in one pipeline, because Redis has no keepalive streams.
pub(crate) struct Touches {
    connection: MultiplexedConnection,
    touches: Pipeline,
}

impl Turn for Touches {
    async fn turn(&mut self) -> Result<u64> {
        let touched: Vec<u64> = self.touches.query_async(&mut self.connection).await?;
        Ok(touched.iter().sum())
    }
}

/// Whether Redis answers at `address`.
pub(crate) async fn answers(address: &str) -> bool {
    Redis::connect(address).await.is_ok()
}
