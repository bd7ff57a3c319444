from example.urls import urlpatterns

__all__ = ["urlpatterns"]
