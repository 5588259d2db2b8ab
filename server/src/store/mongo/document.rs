//! Reads records from MongoDB documents, and names the fields:
//!
//! ```text
//! { _id: key, token: long, rev: long, notify_rev: long, edited_at: date, commit_tag: long,
//!   blocked_until: date | null, in_use: true,
//!   holders: [{ id: uuid, owner, metadata: [{ k, v }], mode, shared_limit, ttl: ms, min_hold: ms,
//!     size, repeated, token, acquired_at, expires_at }],
//!   waiters: [{ id, owner, metadata, mode, shared_limit, ttl, min_hold, size, repeated, wait,
//!     since, expires_at }],
//!   departures: [{ id, reason, at, lasting }] }
//! ```
//!
//! - `metadata` is an array of pairs, so that a caller's text never becomes a field name.
//! - `repeated` and `lasting` are absent if false, as they mostly are.
//! - `edited_at` is the instant of the latest edit. A commit reads the database's time from it,
//!   which costs the database less than computing `$$NOW` for each record.
//! - `commit_tag` names the command that made the latest edit. It tells a commit which of its edits
//!   were made.
//! - `in_use` exists for listings alone, and is absent from free records ([`super::index`]).
//! - `notify_rev` exists for the change feed alone, and the rules do not use it. It is the `rev` of
//!   the latest edit that the feed must report. Touches, refreshes, nudges and edits that keep ids
//!   out count only if they change the queue.

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

/// A document that is not a valid record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InvalidDocument {
    key: String,
    field: &'static str,
}

impl InvalidDocument {
    /// Returns the error for callers that ask for the key. `None` if the document's `_id` is not a
    /// valid key, so that no caller can ask for it.
    pub(super) fn into_unreadable(self) -> Option<StoreError> {
        let key = Key::try_from(self.key.as_str()).ok()?;
        Some(StoreError::Unreadable {
            key,
            cause: format!("field {} is missing or of another type", self.field),
        })
    }
}

/// The field with the instant of the latest edit.
pub(super) const EDITED_AT: &str = "edited_at";
/// The field that names the command of the latest edit.
pub(super) const COMMIT_TAG: &str = "commit_tag";
/// The field that [`projection`] adds, with the database's time.
const NOW: &str = "now";

/// A record after an edit.
#[derive(Debug)]
pub(super) struct Edited {
    pub(super) snapshot: Snapshot,
    /// The command that made the latest edit.
    pub(super) tag: Option<i64>,
}

/// The projection of a record, with the database's time beside it. `now` is an expression.
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

/// The document of an acquisition. The pipeline adds `since` and `expires_at`.
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

/// The fields in which two acquisitions must agree to count as the same. The pipeline compares
/// whole documents, so the order of the fields matters.
pub(super) fn request(acquisition: &Acquisition) -> Document {
    doc! {
        "id": uuid(acquisition.id),
        "mode": mode(acquisition.mode),
        "shared_limit": i64::from(acquisition.shared_limit),
    }
}

/// Reads a document that was found with [`projection`].
pub(super) fn snapshot(document: &RawDocument) -> Result<Snapshot, InvalidDocument> {
    let record = record(document)?;
    let root = Fields { document, key: record.key.as_str() };
    let now = root.date(NOW)?;
    Ok(Snapshot { record, now })
}

/// Reads a whole document, as of its latest edit. A document that has been inserted and not edited
/// yet is empty, so its time does not matter.
pub(super) fn edited(document: &RawDocument) -> Result<Edited, InvalidDocument> {
    let record = record(document)?;
    let root = Fields { document, key: record.key.as_str() };
    let now = root.maybe(EDITED_AT, date)?.unwrap_or(Timestamp(0));
    let tag = root.maybe(COMMIT_TAG, RawBsonRef::as_i64)?;
    Ok(Edited { snapshot: Snapshot { record, now }, tag })
}

fn record(document: &RawDocument) -> Result<Record, InvalidDocument> {
    let root = Fields { document, key: "?" };
    let name = root.text("_id")?;
    let root = Fields { document, key: name };
    let key = Key::try_from(name).map_err(|_| root.invalid("_id"))?;
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

fn holder(fields: &Fields<'_>) -> Result<Holder, InvalidDocument> {
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
        // Records of earlier versions lack the field.
        shared_limit: fields.maybe("shared_limit", limit)?.unwrap_or(MAX_SHARED_HOLDERS),
        repeated: fields.flag("repeated")?,
    })
}

fn waiter(fields: &Fields<'_>) -> Result<Waiter, InvalidDocument> {
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

fn departure(fields: &Fields<'_>) -> Result<Departure, InvalidDocument> {
    let reason = match fields.text("reason")? {
        "released" => Reason::Released,
        "displaced" => Reason::Displaced,
        "revoked" => Reason::Revoked,
        "withdrawn" => Reason::Withdrawn,
        "settled" => Reason::Settled,
        _ => return Err(fields.invalid("reason")),
    };
    Ok(Departure { id: fields.id()?, reason, at: fields.date("at")?, lasting: fields.flag("lasting")? })
}

fn limit(value: RawBsonRef<'_>) -> Option<u32> {
    u32::try_from(value.as_i64()?).ok()
}

fn date(value: RawBsonRef<'_>) -> Option<Timestamp> {
    value.as_datetime().map(|date| Timestamp(date.timestamp_millis()))
}

/// Typed access to the fields of a document, or of a document inside the record of `key`.
struct Fields<'a> {
    document: &'a RawDocument,
    key: &'a str,
}

impl<'a> Fields<'a> {
    fn invalid(&self, field: &'static str) -> InvalidDocument {
        InvalidDocument { key: self.key.to_owned(), field }
    }

    /// Reads a field. Returns `None` if it is absent or null.
    fn maybe<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(RawBsonRef<'a>) -> Option<T>,
    ) -> Result<Option<T>, InvalidDocument> {
        match self.document.get(field) {
            Ok(None | Some(RawBsonRef::Null)) => Ok(None),
            Ok(Some(value)) => read(value).map(Some).ok_or_else(|| self.invalid(field)),
            Err(_) => Err(self.invalid(field)),
        }
    }

    fn required<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(RawBsonRef<'a>) -> Option<T>,
    ) -> Result<T, InvalidDocument> {
        self.maybe(field, read)?.ok_or_else(|| self.invalid(field))
    }

    fn text(&self, field: &'static str) -> Result<&'a str, InvalidDocument> {
        self.required(field, RawBsonRef::as_str)
    }

    fn long(&self, field: &'static str) -> Result<i64, InvalidDocument> {
        self.required(field, RawBsonRef::as_i64)
    }

    fn date(&self, field: &'static str) -> Result<Timestamp, InvalidDocument> {
        self.required(field, date)
    }

    /// Reads a boolean. An absent field counts as false.
    fn flag(&self, field: &'static str) -> Result<bool, InvalidDocument> {
        Ok(self.maybe(field, RawBsonRef::as_bool)?.unwrap_or(false))
    }

    fn duration(&self, field: &'static str) -> Result<Duration, InvalidDocument> {
        u64::try_from(self.long(field)?).map(Duration::from_millis).map_err(|_| self.invalid(field))
    }

    fn ttl(&self) -> Result<Ttl, InvalidDocument> {
        Ttl::new(self.duration("ttl")?).ok_or_else(|| self.invalid("ttl"))
    }

    fn id(&self) -> Result<LeaseId, InvalidDocument> {
        let bytes = self.required("id", |value| value.as_binary()?.bytes.try_into().ok())?;
        Ok(<[u8; 16]>::into(bytes))
    }

    fn mode(&self) -> Result<Mode, InvalidDocument> {
        match self.text("mode")? {
            "exclusive" => Ok(Mode::Exclusive),
            "shared" => Ok(Mode::Shared),
            _ => Err(self.invalid("mode")),
        }
    }

    fn metadata(&self) -> Result<BTreeMap<String, String>, InvalidDocument> {
        let pairs =
            self.list("metadata", |pair| Ok((pair.text("k")?.to_owned(), pair.text("v")?.to_owned())))?;
        Ok(pairs.into_iter().collect())
    }

    /// Reads an array of documents. An absent field counts as empty.
    fn list<T>(
        &self,
        field: &'static str,
        read: impl Fn(&Fields<'a>) -> Result<T, InvalidDocument>,
    ) -> Result<Vec<T>, InvalidDocument> {
        let Some(array) = self.maybe(field, RawBsonRef::as_array)? else { return Ok(Vec::new()) };
        let entries = array.into_iter().map(|entry| {
            let document =
                entry.ok().and_then(|value| value.as_document()).ok_or_else(|| self.invalid(field))?;
            read(&Fields { document, key: self.key })
        });
        entries.collect()
    }
}
