//! Records as MongoDB documents: the names and types of their fields.
//!
//! ```text
//! { _id: key, token: long, rev: long, epoch: long, edited_at: date, mark: long, blocked_until: date | null,
//!   in_use: true,
//!   holders: [{ id: uuid, owner, metadata: [{ k, v }], mode, shared_limit, ttl: ms, min_hold: ms, size, repeated, token,
//!     acquired_at, expires_at }],
//!   waiters: [{ id, owner, metadata, mode, shared_limit, ttl, min_hold, size, repeated, wait, since, expires_at }],
//!   departures: [{ id, reason, at, lasting }] }
//! ```
//!
//! Metadata is an array of pairs: a caller's text never becomes a field name. `repeated` and `lasting` are absent where they
//! are false, as they mostly are.
//!
//! `edited_at` is the instant of the latest edit. A commit reads it as the clock, which costs the database less than to
//! compute its clock beside every record. `mark` names the command that made the edit: by it a commit that found fewer
//! records than it has edits tells which of them are done.
//!
//! `in_use` is for listings alone ([`super::index`]): a record that is free does not have it.
//!
//! `epoch` is for the change feed alone, and no part of a record as the rules know it: the `rev` of the latest edit that
//! other daemons should hear of. Touches, refreshes and nudges are told only if they moved the line.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mongodb::bson::raw::{RawBsonRef, RawDocument};
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, Document, doc};

use crate::lease::{
    Acquisition, Departure, FencingToken, Holder, Key, LeaseId, MAX_SHARED_HOLDERS, Mode, Reason, Record,
    Snapshot, Timestamp, Ttl, Waiter, millis,
};
use crate::store::StoreError;

/// A document that is not a record of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Foreign {
    key: String,
    field: &'static str,
}

impl Foreign {
    /// What callers for its key are answered; `None` if no call can name it.
    pub(super) fn into_unreadable(self) -> Option<StoreError> {
        let key = Key::try_from(self.key.as_str()).ok()?;
        Some(StoreError::Unreadable {
            key,
            cause: format!("field {} is missing or of another type", self.field),
        })
    }
}

/// The fields with the instant of the latest edit and the command that made it.
pub(super) const EDITED_AT: &str = "edited_at";
pub(super) const MARK: &str = "mark";
/// The field with the store's clock in what [`projection`] shows.
const NOW: &str = "now";

/// A record after an edit.
#[derive(Debug)]
pub(super) struct Edited {
    pub(super) snapshot: Snapshot,
    pub(super) mark: Option<i64>,
}

/// A projection of a whole record with the store's clock beside it, given as an expression.
pub(super) fn projection(now: &Bson) -> Document {
    doc! {
        "token": 1, "rev": 1, "blocked_until": 1, "holders": 1, "waiters": 1, "departures": 1, NOW: now.clone(),
    }
}

pub(super) fn uuid(id: LeaseId) -> Bson {
    Bson::Binary(Binary { subtype: BinarySubtype::Uuid, bytes: id.to_bytes().to_vec() })
}

pub(super) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Exclusive => "exclusive",
        Mode::Shared => "shared",
    }
}

pub(super) fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Released => "released",
        Reason::Displaced => "displaced",
        Reason::Revoked => "revoked",
        Reason::Withdrawn => "withdrawn",
        Reason::Settled => "settled",
    }
}

/// What an arrival brings; the pipeline adds `since` and `expires_at`.
pub(super) fn acquisition(acquisition: &Acquisition) -> Document {
    let metadata: Vec<Bson> =
        acquisition.metadata.iter().map(|(k, v)| doc! { "k": k, "v": v }.into()).collect();
    let mut document = doc! {
        "id": uuid(acquisition.id),
        "owner": &acquisition.owner,
        "metadata": metadata,
        "mode": mode(acquisition.mode),
        "shared_limit": i64::from(acquisition.shared_limit),
        "ttl": millis(acquisition.ttl.get()),
        "min_hold": millis(acquisition.min_hold),
        "size": i64::try_from(acquisition.size()).unwrap_or(i64::MAX),
        "wait": acquisition.wait,
    };
    if acquisition.repeated {
        document.insert("repeated", true);
    }
    document
}

/// What makes a request for the same id a repetition: the same mode and limit. In the order of these fields.
pub(super) fn request(acquisition: &Acquisition) -> Document {
    doc! {
        "id": uuid(acquisition.id),
        "mode": mode(acquisition.mode),
        "shared_limit": i64::from(acquisition.shared_limit),
    }
}

/// Reads a document got with [`projection`].
pub(super) fn snapshot(document: &RawDocument) -> Result<Snapshot, Foreign> {
    let record = record(document)?;
    let root = Fields { document, key: record.key.as_str() };
    let now = root.date(NOW)?;
    Ok(Snapshot { record, now })
}

/// Reads a whole document, as it was when it was edited last. One that has been made and not edited yet holds nothing that
/// its instant could matter to.
pub(super) fn edited(document: &RawDocument) -> Result<Edited, Foreign> {
    let record = record(document)?;
    let root = Fields { document, key: record.key.as_str() };
    let now = root.maybe(EDITED_AT, date)?.unwrap_or(Timestamp(0));
    let mark = root.maybe(MARK, RawBsonRef::as_i64)?;
    Ok(Edited { snapshot: Snapshot { record, now }, mark })
}

fn record(document: &RawDocument) -> Result<Record, Foreign> {
    let root = Fields { document, key: "?" };
    let name = root.text("_id")?;
    let root = Fields { document, key: name };
    let key = Key::try_from(name).map_err(|_| root.foreign("_id"))?;
    Ok(Record {
        key,
        token: FencingToken(root.maybe("token", RawBsonRef::as_i64)?.unwrap_or(0)),
        rev: root.maybe("rev", RawBsonRef::as_i64)?.unwrap_or(0),
        blocked_until: root.maybe("blocked_until", date)?,
        holders: root.list("holders", holder)?,
        waiters: root.list("waiters", waiter)?,
        departures: root.list("departures", departure)?,
    })
}

fn holder(fields: &Fields<'_>) -> Result<Holder, Foreign> {
    Ok(Holder {
        id: fields.id()?,
        owner: fields.text("owner")?.to_owned(),
        metadata: fields.metadata()?,
        mode: fields.mode()?,
        ttl: fields.ttl()?,
        token: FencingToken(fields.long("token")?),
        acquired_at: fields.date("acquired_at")?,
        expires_at: fields.date("expires_at")?,
        min_hold: fields.duration("min_hold")?,
        // Records of earlier versions do not say it.
        shared_limit: fields.maybe("shared_limit", limit)?.unwrap_or(MAX_SHARED_HOLDERS),
        repeated: fields.flag("repeated")?,
    })
}

fn waiter(fields: &Fields<'_>) -> Result<Waiter, Foreign> {
    let acquisition = Acquisition {
        id: fields.id()?,
        owner: fields.text("owner")?.to_owned(),
        metadata: fields.metadata()?,
        mode: fields.mode()?,
        shared_limit: fields.required("shared_limit", limit)?,
        ttl: fields.ttl()?,
        min_hold: fields.duration("min_hold")?,
        wait: fields.required("wait", RawBsonRef::as_bool)?,
        repeated: fields.flag("repeated")?,
    };
    Ok(Waiter {
        acquisition: Arc::new(acquisition),
        since: fields.date("since")?,
        expires_at: fields.date("expires_at")?,
    })
}

fn departure(fields: &Fields<'_>) -> Result<Departure, Foreign> {
    let reason = match fields.text("reason")? {
        "released" => Reason::Released,
        "displaced" => Reason::Displaced,
        "revoked" => Reason::Revoked,
        "withdrawn" => Reason::Withdrawn,
        "settled" => Reason::Settled,
        _ => return Err(fields.foreign("reason")),
    };
    Ok(Departure { id: fields.id()?, reason, at: fields.date("at")?, lasting: fields.flag("lasting")? })
}

fn limit(value: RawBsonRef<'_>) -> Option<u32> {
    u32::try_from(value.as_i64()?).ok()
}

fn date(value: RawBsonRef<'_>) -> Option<Timestamp> {
    value.as_datetime().map(|date| Timestamp(date.timestamp_millis()))
}

/// Typed access to the fields of one (sub)document of the record `key`.
struct Fields<'a> {
    document: &'a RawDocument,
    key: &'a str,
}

impl<'a> Fields<'a> {
    fn foreign(&self, field: &'static str) -> Foreign {
        Foreign { key: self.key.to_owned(), field }
    }

    /// `None` if the field is absent or null.
    fn maybe<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(RawBsonRef<'a>) -> Option<T>,
    ) -> Result<Option<T>, Foreign> {
        match self.document.get(field) {
            Ok(None | Some(RawBsonRef::Null)) => Ok(None),
            Ok(Some(value)) => read(value).map(Some).ok_or_else(|| self.foreign(field)),
            Err(_) => Err(self.foreign(field)),
        }
    }

    fn required<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(RawBsonRef<'a>) -> Option<T>,
    ) -> Result<T, Foreign> {
        self.maybe(field, read)?.ok_or_else(|| self.foreign(field))
    }

    fn text(&self, field: &'static str) -> Result<&'a str, Foreign> {
        self.required(field, RawBsonRef::as_str)
    }

    fn long(&self, field: &'static str) -> Result<i64, Foreign> {
        self.required(field, RawBsonRef::as_i64)
    }

    fn date(&self, field: &'static str) -> Result<Timestamp, Foreign> {
        self.required(field, date)
    }

    /// False if the field is absent.
    fn flag(&self, field: &'static str) -> Result<bool, Foreign> {
        Ok(self.maybe(field, RawBsonRef::as_bool)?.unwrap_or(false))
    }

    fn duration(&self, field: &'static str) -> Result<Duration, Foreign> {
        u64::try_from(self.long(field)?).map(Duration::from_millis).map_err(|_| self.foreign(field))
    }

    fn ttl(&self) -> Result<Ttl, Foreign> {
        Ttl::new(self.duration("ttl")?).ok_or_else(|| self.foreign("ttl"))
    }

    fn id(&self) -> Result<LeaseId, Foreign> {
        let bytes = self.required("id", |value| value.as_binary()?.bytes.try_into().ok())?;
        Ok(<[u8; 16]>::into(bytes))
    }

    fn mode(&self) -> Result<Mode, Foreign> {
        match self.text("mode")? {
            "exclusive" => Ok(Mode::Exclusive),
            "shared" => Ok(Mode::Shared),
            _ => Err(self.foreign("mode")),
        }
    }

    fn metadata(&self) -> Result<BTreeMap<String, String>, Foreign> {
        let pairs =
            self.list("metadata", |pair| Ok((pair.text("k")?.to_owned(), pair.text("v")?.to_owned())))?;
        Ok(pairs.into_iter().collect())
    }

    /// Empty if the field is absent.
    fn list<T>(
        &self,
        field: &'static str,
        read: impl Fn(&Fields<'a>) -> Result<T, Foreign>,
    ) -> Result<Vec<T>, Foreign> {
        let Some(array) = self.maybe(field, RawBsonRef::as_array)? else { return Ok(Vec::new()) };
        let entries = array.into_iter().map(|entry| {
            let document =
                entry.ok().and_then(|value| value.as_document()).ok_or_else(|| self.foreign(field))?;
            read(&Fields { document, key: self.key })
        });
        entries.collect()
    }
}
