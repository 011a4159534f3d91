"""Everything that administration is done with, built once over one database: for the API and for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.adapting import Adapting
from service.administration import Administration
from service.containment import Switch
from service.deeds import Deeds
from service.erasing import Erasing
from service.inquiry import Inquiry
from service.present_use import PresentUse
from service.silencing import Silencing
from tenants.audit import Audit
from tenants.backups import Backups
from tenants.canaries import Canaries
from tenants.cosignatures import Cosignatures
from tenants.denials import Denials
from tenants.directory import Directory
from tenants.erasure import Erasure
from tenants.lifecycle import Lifecycle
from tenants.presence import Presences
from tenants.proofs import Proofs
from tenants.pruning import Pruning
from tenants.quotas import Quotas
from tenants.repeats import Repeats
from tenants.reviews import Reviews
from tenants.search import Search
from tenants.searches import Searches
from tenants.sequencer import Sequencer, log_signer
from tenants.sessions import Sessions
from tenants.silences import Silences
from tenants.thresholds import Thresholds
from tenants.told_alerts import ToldAlerts

if TYPE_CHECKING:
    from service.installation import Installation
    from tenants.database import Database


@dataclass(frozen=True, slots=True)
class Desk:
    """What an administrator works with."""

    database: Database
    directory: Directory
    lifecycle: Lifecycle
    sessions: Sessions
    quotas: Quotas
    audit: Audit
    sequencer: Sequencer
    proofs: Proofs
    cosignatures: Cosignatures
    presences: Presences
    repeats: Repeats
    denials: Denials
    deeds: Deeds
    use: PresentUse
    administration: Administration
    switch: Switch
    reviews: Reviews
    thresholds: Thresholds
    canaries: Canaries
    adapting: Adapting
    erasing: Erasing
    inquiry: Inquiry
    silences: Silences
    silencing: Silencing
    told_alerts: ToldAlerts
    backups: Backups


def build_desk(database: Database, installation: Installation) -> Desk:
    """A desk over an open database, or one that will be open before it is used."""
    directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
    lifecycle = Lifecycle(database)
    sessions = Sessions(database)
    quotas = Quotas(database)
    audit = Audit(database, master_key=installation.master_key)
    signer = log_signer(installation.log_key)
    presences = Presences(database)
    denials = Denials(database)
    deeds = Deeds(database, audit)
    reviews, canaries = Reviews(database), Canaries(database)
    thresholds = Thresholds(database, directory.policies)
    sequencer = Sequencer(database, signer)
    silences = Silences(database)
    use = PresentUse(database=database, quotas=quotas, sessions=sessions)
    return Desk(
        database=database,
        directory=directory,
        lifecycle=lifecycle,
        sessions=sessions,
        quotas=quotas,
        audit=audit,
        sequencer=sequencer,
        proofs=Proofs(database, signer.key),
        cosignatures=Cosignatures(database, signer.key),
        presences=presences,
        repeats=Repeats(database, master_key=installation.master_key),
        denials=denials,
        deeds=deeds,
        use=use,
        administration=Administration(
            deeds=deeds,
            directory=directory,
            lifecycle=lifecycle,
            keys=directory.keys,
            denials=denials,
            sessions=sessions,
            use=use,
        ),
        switch=Switch(deeds=deeds, lifecycle=lifecycle, presences=presences),
        reviews=reviews,
        thresholds=thresholds,
        canaries=canaries,
        adapting=Adapting(
            deeds=deeds, lifecycle=lifecycle, reviews=reviews, thresholds=thresholds, canaries=canaries
        ),
        erasing=Erasing(
            database=database,
            deeds=deeds,
            audit=audit,
            erasure=Erasure(database, master_key=installation.master_key),
            pruning=Pruning(database),
            sequencer=sequencer,
        ),
        inquiry=Inquiry(
            search=Search(database),
            searches=Searches(database),
            audit=audit,
            lifecycle=lifecycle,
            deeds=deeds,
        ),
        silences=silences,
        silencing=Silencing(deeds=deeds, silences=silences),
        told_alerts=ToldAlerts(database),
        backups=Backups(database),
    )
