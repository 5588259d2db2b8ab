//! Builds expressions of MongoDB's aggregation language. None of them depends on the fields of a
//! record.

use mongodb::bson::{Bson, Document, doc};

/// Quotes a value. Without `$literal` a string that begins with `$` would be a field or a variable.
pub(super) fn literal(value: Bson) -> Bson {
    doc! { "$literal": value }.into()
}

pub(super) fn not(condition: &Document) -> Document {
    doc! { "$not": [condition.clone()] }
}

pub(super) fn filter(input: impl Into<Bson>, name: &str, condition: impl Into<Bson>) -> Bson {
    doc! { "$filter": { "input": input.into(), "as": name, "cond": condition.into() } }.into()
}

pub(super) fn map(input: impl Into<Bson>, name: &str, value: impl Into<Bson>) -> Bson {
    doc! { "$map": { "input": input.into(), "as": name, "in": value } }.into()
}

/// Defines variables for the expression `value`.
pub(super) fn bind(variables: Document, value: impl Into<Bson>) -> Bson {
    doc! { "$let": { "vars": variables, "in": value.into() } }.into()
}
