//! A list in the order of insertion without duplicates, in which an entry is found by its name.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;

use super::{Acquisition, LeaseId, Timestamp};

/// Lists up to this length are searched linearly. Most lists have one entry, and an index would
/// cost an allocation.
const LINEAR: usize = 16;

/// An entry of a [`UniqueList`], and the name by which the list finds it.
pub(crate) trait Named {
    type Name: Copy + Eq + Hash;

    fn name(&self) -> Self::Name;
}

impl Named for LeaseId {
    type Name = Self;

    fn name(&self) -> Self {
        *self
    }
}

impl Named for Timestamp {
    type Name = Self;

    fn name(&self) -> Self {
        *self
    }
}

impl Named for Arc<Acquisition> {
    type Name = LeaseId;

    fn name(&self) -> LeaseId {
        self.id
    }
}

/// A list with at most one entry of each name. Two lists are equal if their entries are.
#[derive(Debug, Clone)]
pub(crate) struct UniqueList<T: Named> {
    entries: Vec<T>,
    /// The position of each entry, if the list is longer than [`LINEAR`].
    #[expect(
        clippy::box_collection,
        reason = "an edit has nine lists, and few need an index; a pointer is smaller"
    )]
    index: Option<Box<HashMap<T::Name, usize>>>,
}

impl<T: Named> UniqueList<T> {
    /// Adds an entry. If the list has an entry of the same name, adds nothing and returns that
    /// entry.
    pub(super) fn add(&mut self, entry: T) -> Option<&mut T> {
        let name = entry.name();
        if let Some(position) = self.position(name) {
            return self.entries.get_mut(position);
        }
        self.entries.push(entry);
        let length = self.entries.len();
        if length > LINEAR {
            // On the first overflow the index is empty, so this adds all entries. Later it adds
            // only the new one.
            let index = self.index.get_or_insert_default();
            let first = index.len();
            index.extend((first..length).map(|position| (self.entries[position].name(), position)));
        }
        None
    }

    /// Returns true if an entry has this name.
    pub(super) fn has(&self, name: T::Name) -> bool {
        self.position(name).is_some()
    }

    /// Returns the entry with this name.
    pub(super) fn get(&self, name: T::Name) -> Option<&T> {
        self.position(name).map(|position| &self.entries[position])
    }

    /// Applies `change` to each entry. `change` must keep the entry's name, which the index relies
    /// on.
    pub(super) fn change(&mut self, change: impl FnMut(&mut T)) {
        self.entries.iter_mut().for_each(change);
    }

    fn position(&self, name: T::Name) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(&name).copied(),
            None => self.entries.iter().position(|entry| entry.name() == name),
        }
    }
}

impl<T: Named> Default for UniqueList<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), index: None }
    }
}

impl<T: Named + PartialEq> PartialEq for UniqueList<T> {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl<T: Named + Eq> Eq for UniqueList<T> {}

impl<T: Named> Deref for UniqueList<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_any_length_has_each_name_once() {
        for length in [1, LINEAR, LINEAR + 1, 5 * LINEAR] {
            let mut list = UniqueList::default();
            let instants: Vec<_> = (0..length).map(|number| Timestamp(number as i64)).collect();
            for instant in &instants {
                assert_eq!(list.add(*instant), None);
                assert!(list.has(*instant));
                assert_eq!(list.get(*instant), Some(instant));
            }
            for instant in &instants {
                assert_eq!(list.add(*instant), Some(&mut instant.clone()));
            }
            assert_eq!(list[..], instants[..]);
            assert!(!list.has(Timestamp(-1)));
        }
    }
}
